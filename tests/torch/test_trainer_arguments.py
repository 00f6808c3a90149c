"""Wrong arguments of what the Hugging Face Trainer is given, by kind: each is named, most before a training begins."""

import pytest
import torch
from tiny_attention import TinyModel
from torch import nn
from transformers.trainer_callback import TrainerControl, TrainerState
from wrong_arguments import (
    NO_COUNT,
    NO_FLAG,
    NO_NUMBER,
    NO_RATE,
    NOT_BELOW_ONE,
    NOT_POSITIVE,
    assert_all_named,
    but_none,
    one_tau,
)

from muonclip.torch import QKClip
from muonclip.torch.huggingface import MonitorCallback, MuonClipFactory, QKClipCallback

MODEL = TinyModel()
OPTIMIZER = torch.optim.AdamW(MODEL.parameters())
NO_TEXT = NO_NUMBER.filter(lambda value: not isinstance(value, str))
RIGHT = dict(model=MODEL, lr=0.01, weight_decay=0.1)
FACTORY = dict(
    model=NO_NUMBER, lr=NO_RATE, weight_decay=NO_RATE, tau=one_tau(NOT_POSITIVE),
    momentum=NOT_BELOW_ONE, capturable=NO_FLAG, qk_clip=but_none(NO_NUMBER),
    adamw=but_none(NO_TEXT).filter(lambda value: not isinstance(value, dict)),
)  # fmt: skip
CALLBACKS = {
    MuonClipFactory: (lambda **options: MuonClipFactory()(**RIGHT | options), FACTORY),
    QKClipCallback: (QKClipCallback, dict(clip=but_none(NO_NUMBER), prefix=NO_TEXT)),
    MonitorCallback: (
        MonitorCallback,
        dict(prefix=NO_TEXT, every=NO_COUNT, logits=NO_FLAG, matrices=NO_FLAG, clip=but_none(NO_NUMBER)),
    ),
}


@pytest.mark.parametrize(
    ("kind", "argument"), [(kind, argument) for kind, (_, wrong) in CALLBACKS.items() for argument in wrong]
)
def test_a_wrong_argument_is_named(kind, argument):
    call, wrong = CALLBACKS[kind]
    assert_all_named(call, argument, wrong[argument], [MODEL, OPTIMIZER])


@pytest.mark.parametrize("missing", ["lr", "weight_decay"])
def test_a_rate_that_was_left_to_the_trainer_is_named(missing):
    given = {name: value for name, value in RIGHT.items() if name != missing}
    with pytest.raises(
        TypeError, match=rf"'{missing}' is missing, .*TrainingArguments.* Write optimizer_cls_and_kwargs"
    ):
        MuonClipFactory()(**given)


@pytest.mark.parametrize("option", ["learning_rate", "wd", "betas", "taus"])
def test_an_option_that_there_is_not_is_named(option):
    with pytest.raises(TypeError, match=f"'{option}' is not an option of MuonClip"):
        MuonClipFactory()(**RIGHT, **{option: 0.1})


def begin(callback, **given):
    callback.on_train_begin(None, TrainerState(), TrainerControl(), **given)


class Looking(torch.optim.SGD):
    """Has something else under the name of the clip."""

    qk_clip = "mine"


def test_what_is_missing_when_the_training_begins_is_named():
    for optimizer in (None, OPTIMIZER, Looking(MODEL.parameters())):
        with pytest.raises(ValueError, match="found no QK-Clip in the optimizer"):
            begin(QKClipCallback(), optimizer=optimizer)
    with pytest.raises(TypeError, match="model=None is a NoneType"):
        begin(MonitorCallback(), optimizer=OPTIMIZER)
    with pytest.raises(TypeError, match="optimizer=None is a NoneType"):
        begin(MonitorCallback(), model=MODEL)


def test_a_log_of_a_model_with_nothing_to_clip_has_nothing_of_the_clip():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="nothing to clip"):
        optimizer = MuonClipFactory()(model, lr=0.01, weight_decay=0.1)
    callback, state = QKClipCallback(), TrainerState(log_history=[{"loss": 1.0}])
    begin(callback, optimizer=optimizer)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    logs = {"loss": 1.0}
    callback.on_optimizer_step(None, state, TrainerControl(), optimizer=optimizer)
    callback.on_log(None, state, TrainerControl(), logs=logs)
    assert logs == {"loss": 1.0} == state.log_history[-1]


def test_a_clip_that_is_given_goes_before_that_of_the_optimizer():
    clip = QKClip(MODEL)
    callback = QKClipCallback(clip)
    begin(callback, optimizer=Looking(MODEL.parameters()))
    assert callback._clip is clip
