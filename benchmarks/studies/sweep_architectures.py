"""The architectures of the sweep: which models of which libraries, with what sizes, and called with what."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.sweep_models import BATCH, Architecture, numbers, tokens

_DECODERS = """
LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM
MixtralForCausalLM GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM VaultGemmaForCausalLM PhiForCausalLM
Phi3ForCausalLM PhimoeForCausalLM GPT2LMHeadModel GPTNeoXForCausalLM GPTJForCausalLM GPTBigCodeForCausalLM
OpenAIGPTModel BloomForCausalLM OPTForCausalLM StableLmForCausalLM Starcoder2ForCausalLM CohereForCausalLM
Cohere2ForCausalLM OlmoForCausalLM Olmo2ForCausalLM OlmoeForCausalLM GraniteForCausalLM GraniteMoeForCausalLM
GptOssForCausalLM GlmForCausalLM Glm4ForCausalLM HeliumForCausalLM PersimmonForCausalLM CodeGenForCausalLM
XGLMForCausalLM BioGptForCausalLM SmolLM3ForCausalLM Exaone4ForCausalLM ArceeForCausalLM SeedOssForCausalLM
DiffLlamaForCausalLM DogeForCausalLM JetMoeForCausalLM CTRLModel Llama4ForCausalLM ApertusForCausalLM BitNetForCausalLM
Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM Olmo3ForCausalLM FlexOlmoForCausalLM Glm4MoeForCausalLM
MoshiForCausalLM GPTNeoXJapaneseForCausalLM CpmAntModel TrOCRForCausalLM BarkSemanticModel
"""
_HYBRIDS = "MiniMaxForCausalLM Lfm2ForCausalLM MambaForCausalLM RwkvForCausalLM"
_ENCODERS = """
BertForMaskedLM RobertaModel AlbertModel ElectraModel DebertaModel DebertaV2Model MPNetModel NystromformerModel
FNetModel ConvBertModel ModernBertModel RoFormerModel LongformerModel BigBirdModel CanineModel YosoModel IBertModel
SplinterModel MegatronBertModel RemBertModel NomicBertModel EuroBertModel TapasModel MarkupLMModel RoCBertModel
"""
_SEQUENCE_TO_SEQUENCE = """
T5ForConditionalGeneration UMT5Model LongT5Model BartModel MBartModel PegasusXModel MarianModel M2M100Model LEDModel
BigBirdPegasusModel NllbMoeModel PLBartModel MvpModel PegasusModel BlenderbotSmallModel
"""
_VISION = """
ViTModel DeiTModel BeitModel Data2VecVisionModel Dinov2Model Dinov2WithRegistersModel DINOv3ViTModel VitDetModel
YolosModel SiglipVisionModel CLIPVisionModel IJepaModel ViTMAEModel ViTMSNModel DPTModel Aimv2VisionModel
PixtralVisionModel
"""


def _all(library: str, models: dict[str, tuple[dict[str, Any], Any]]) -> tuple[Architecture, ...]:
    return tuple(Architecture(name, library, options, inputs) for name, (options, inputs) in models.items())


def _image(size: int) -> dict[str, Any]:
    return {"pixel_values": numbers(3, size, size)}


def _long(length: int) -> dict[str, Any]:
    return {"input_ids": lambda: torch.randint(3, 60, (BATCH, length))}


def _two() -> Tensor:
    return torch.tensor([3, 5])


_BOTH: dict[str, Any] = {"input_ids": tokens, "pixel_values": numbers(3, 24, 24)}
_TWO_CONFIGS: dict[str, Any] = {"text_config": {}, "vision_config": {}}
_MAMBA2 = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
_DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_WAVE: dict[str, Any] = {
    "conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [5, 4], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
_STAGES: dict[str, Any] = {
    "hidden_sizes": [8, 16], "depths": [1, 1], "num_attention_heads": [1, 2], "num_encoder_blocks": 2,
    "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
}  # fmt: skip
_WINDOWS: dict[str, Any] = {
    "image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
_SAM = {"image_size": 32, "patch_size": 8, "window_size": 2, "global_attn_indexes": [1], "output_channels": 8}
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
_SERIES: dict[str, Any] = {
    "prediction_length": 3, "context_length": 6, "lags_sequence": [1], "num_time_features": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2,
}  # fmt: skip
_PAST: dict[str, Any] = {
    "past_values": numbers(7), "past_time_features": numbers(7, 1), "past_observed_mask": lambda: torch.ones(BATCH, 7),
    "future_values": numbers(3), "future_time_features": numbers(3, 1),
}  # fmt: skip
_PICTURE_TOKENS = ((3, 57, 55, 55, 55, 55, 58, 4), (57, 55, 55, 55, 55, 58, 4, 5))
_VL_TEXT = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_VL_TOKENS = {"image_token_id": 55, "video_token_id": 56, "vision_start_token_id": 57, "vision_end_token_id": 58}
_VL_VISION = {
    "depth": 2, "num_heads": 4, "hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "in_channels": 3,
}  # fmt: skip
_VL_INPUTS: dict[str, Any] = {
    "input_ids": lambda: torch.tensor(_PICTURE_TOKENS), "pixel_values": lambda: torch.randn(32, 96),
    "image_grid_thw": lambda: torch.tensor([[1, 4, 4], [1, 4, 4]]),
    "mm_token_type_ids": lambda: (torch.tensor(_PICTURE_TOKENS) == 55).int(),
}  # fmt: skip
_TRANSFORMERS: dict[str, tuple[dict[str, Any], Any]] = {
    "MptForCausalLM": ({"n_heads": 4, "n_layers": 2}, {}),
    "FalconForCausalLM": ({"num_kv_heads": 2, "new_decoder_architecture": True}, {}),
    "GPTNeoForCausalLM": ({"attention_types": [[["global", "local"], 1]], "window_size": 4, "num_layers": 2}, {}),
    "DeepseekV2ForCausalLM": (
        {"num_key_value_heads": 4, "head_dim": 4, "topk_method": "greedy", "num_experts_per_tok": 2},
        {},
    ),
    "DeepseekV3ForCausalLM": ({"num_key_value_heads": 4, "head_dim": 4}, {}),
    "NemotronForCausalLM": ({"num_key_value_heads": 2, "head_dim": 8}, {}),
    "JambaForCausalLM": (
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        {},
    ),
    "BambaForCausalLM": ({"hidden_size": 48, "attn_layer_indices": [1], **_MAMBA2}, {}),
    "FalconH1ForCausalLM": ({"hidden_size": 48, "mamba_d_ssm": 96, **_MAMBA2}, {}),
    "GraniteMoeHybridForCausalLM": (
        {"hidden_size": 48, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16, **_MAMBA2},
        {},
    ),
    "NemotronHForCausalLM": (
        {
            "hidden_size": 48,
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 6,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 4,
            "use_mamba_kernels": False,
        },
        {},
    ),
    "Zamba2ForCausalLM": (
        {
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "attention_head_dim": 24,
            "adapter_rank": 8,
            "chunk_size": 4,
            "layers_block_type": ["hybrid", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "n_mamba_heads": 6,
            "mamba_headdim": 16,
            "num_mem_blocks": 1,
        },
        {},
    ),
    "RecurrentGemmaForCausalLM": (
        {"lru_width": 32, "attention_window_size": 5, "block_types": ["recurrent", "attention"]},
        {},
    ),
    "Qwen3NextForCausalLM": (_DELTA_NET, {}),
    "OlmoHybridForCausalLM": (_DELTA_NET, {}),
    "KimiLinearForCausalLM": (
        {
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "dense"],
        },
        {},
    ),
    "Mamba2ForCausalLM": ({"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4}, {}),
    "DebertaModel disentangled": (_DISENTANGLED, {}),
    "DebertaV2Model disentangled": (
        {"position_buckets": 4, "share_att_key": True, "norm_rel_ebd": "layer_norm", **_DISENTANGLED},
        {},
    ),
    "DistilBertModel": ({"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, {}),
    "XLMModel": ({"n_words": 60, "emb_dim": 32, "n_layers": 2, "n_heads": 4}, {}),
    "XLNetModel": ({"n_layer": 2, "n_head": 4, "d_inner": 48}, {}),
    "FunnelModel": (
        {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
        {},
    ),
    "SqueezeBertModel": ({"embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 1}, {}),
    "ReformerModel": (
        {
            "axial_pos_shape": [4, 4],
            "axial_pos_embds_dim": [16, 16],
            "attn_layers": ["local", "lsh"],
            "attention_head_size": 8,
            "feed_forward_size": 48,
            "num_buckets": 2,
            "lsh_attn_chunk_length": 4,
            "local_attn_chunk_length": 4,
            "num_hashes": 1,
        },
        _long(16),
    ),
    "EsmModel": ({"vocab_size": 60, "mask_token_id": 4, "pad_token_id": 1, "position_embedding_type": "rotary"}, {}),
    "LayoutLMModel": ({"max_2d_position_embeddings": 20}, {}),
    "BigBirdModel sparse": ({"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}, _long(48)),
    "ProphetNetModel": (
        {
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
        },
        {},
    ),
    "FSMTModel": ({"src_vocab_size": 60, "tgt_vocab_size": 60, "langs": ["en", "de"]}, {}),
    "SwitchTransformersModel": (
        {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        {},
    ),
    "MT5Model": ({"num_layers": 1, "num_decoder_layers": 1}, {}),
    "SwinModel": (_WINDOWS, _image(32)),
    "Swinv2Model": (_WINDOWS, _image(32)),
    "HieraModel": (
        {
            "image_size": [32, 32],
            "patch_size": [7, 7],
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "mask_unit_size": [2, 2],
            "query_stride": [2, 2],
            "num_query_pool": 1,
            "masked_unit_attention": [True, False],
        },
        _image(32),
    ),
    "SegformerModel": (_STAGES, _image(32)),
    "GLPNModel": (_STAGES, _image(32)),
    "PvtV2Model": ({"image_size": 32, **_STAGES}, _image(32)),
    "PvtModel": (
        {
            "image_size": 32,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_attention_heads": [1, 2],
            "num_encoder_blocks": 2,
            "sequence_reduction_ratios": [2, 1],
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
        },
        _image(32),
    ),
    "MobileViTModel": (
        {
            "image_size": 64,
            "patch_size": 2,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 16],
        },
        _image(64),
    ),
    "MobileViTV2Model": (
        {"image_size": 64, "patch_size": 2, "base_attn_unit_dims": [16, 16, 16], "n_attn_blocks": [1, 1, 1]},
        _image(64),
    ),
    "LevitModel": (
        {
            "image_size": 64,
            "patch_size": 16,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "drop_path_rate": 0,
        },
        _image(64),
    ),
    "PoolFormerModel": ({"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}, _image(64)),
    "FocalNetModel": ({"embed_dim": 8, "depths": [1, 1, 1, 1]}, _image(64)),
    "SwiftFormerModel": ({"embed_dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}, _image(64)),
    "ResNetModel": ({"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}, _image(32)),
    "SamVisionModel": (_SAM, _image(32)),
    "SamVisionModel eager": ({"attn_implementation": "eager", **_SAM}, _image(32)),
    "VitDetModel relative": (
        {"use_relative_position_embeddings": True, "window_size": 2, "window_block_indices": [0]},
        {},
    ),
    "BeitModel relative": ({"use_relative_position_bias": True}, {}),
    "VideoMAEModel": ({"num_frames": 4}, {"pixel_values": numbers(4, 3, 24, 24)}),
    "TimesformerModel": ({"num_frames": 4}, {"pixel_values": numbers(4, 3, 24, 24)}),
    "VivitModel": ({"num_frames": 4, "tubelet_size": [2, 8, 8]}, {"pixel_values": numbers(4, 3, 24, 24)}),
    "Swin2SRModel": ({**_WINDOWS, "image_size": 16, "patch_size": 1}, _image(16)),
    "GroupViTVisionModel": ({"depths": [1, 1, 1], "num_group_tokens": [4, 3, 0], "num_output_groups": [4, 3, 0]}, {}),
    "WhisperModel": (
        {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16},
        {"input_features": numbers(8, 20), "decoder_input_ids": tokens},
    ),
    "Speech2TextModel": (
        {"input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 40},
        {"input_features": numbers(20, 8), "decoder_input_ids": tokens},
    ),
    "Wav2Vec2Model": (_WAVE, {"input_values": numbers(200)}),
    "HubertModel": (_WAVE, {"input_values": numbers(200)}),
    "WavLMModel": ({"num_buckets": 8, **_WAVE}, {"input_values": numbers(200)}),
    "UniSpeechModel": (_WAVE, {"input_values": numbers(200)}),
    "SEWModel": ({"squeeze_factor": 2, **_WAVE}, {"input_values": numbers(200)}),
    "SEWDModel": ({"squeeze_factor": 2, **_WAVE}, {"input_values": numbers(200)}),
    "Data2VecAudioModel": (_WAVE, {"input_values": numbers(200)}),
    "Wav2Vec2ConformerModel relative": (
        {"position_embeddings_type": "relative", **_WAVE},
        {"input_values": numbers(200)},
    ),
    "Wav2Vec2ConformerModel rotary": ({"position_embeddings_type": "rotary", **_WAVE}, {"input_values": numbers(200)}),
    "Wav2Vec2BertModel": (
        {"feature_projection_input_dim": 8, "position_embeddings_type": "relative_key"},
        {"input_features": numbers(9, 8)},
    ),
    "ASTModel": (
        {"max_length": 24, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
        {"input_values": numbers(24, 16)},
    ),
    "MoonshineModel": (
        {
            "encoder_num_hidden_layers": 1,
            "decoder_num_hidden_layers": 1,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "encoder_num_key_value_heads": 4,
            "decoder_num_key_value_heads": 4,
        },
        {"input_values": numbers(2000), "decoder_input_ids": tokens},
    ),
    "CLIPModel": (_TWO_CONFIGS, _BOTH),
    "SiglipModel": (_TWO_CONFIGS, _BOTH),
    "BlipModel": (_TWO_CONFIGS, _BOTH),
    "AltCLIPModel": (_TWO_CONFIGS, _BOTH),
    "OwlViTModel": (_TWO_CONFIGS, _BOTH),
    "CLIPSegModel": (_TWO_CONFIGS, _BOTH),
    "ChineseCLIPModel": (_TWO_CONFIGS, _BOTH),
    "ViltModel": ({}, _BOTH),
    "VisualBertModel": ({"visual_embedding_dim": 12}, {"input_ids": tokens, "visual_embeds": numbers(3, 12)}),
    "LxmertModel": (
        {"l_layers": 1, "r_layers": 1, "x_layers": 1, "visual_feat_dim": 12},
        {"input_ids": tokens, "visual_feats": numbers(3, 12), "visual_pos": numbers(3, 4)},
    ),
    "Qwen2VLModel": (
        {"text_config": _VL_TEXT, "vision_config": {"embed_dim": 32, **_VL_VISION}, **_VL_TOKENS},
        _VL_INPUTS,
    ),
    "Qwen2_5_VLModel": (
        {
            "text_config": _VL_TEXT,
            "vision_config": {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1], **_VL_VISION},
            **_VL_TOKENS,
        },
        _VL_INPUTS,
    ),
    "PerceiverModel": (
        {
            "num_latents": 5,
            "d_latents": 32,
            "d_model": 16,
            "num_self_attends_per_block": 1,
            "num_blocks": 1,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
        },
        {"inputs": numbers(9, 16)},
    ),
    "PatchTSTModel": (
        {"num_input_channels": 3, "context_length": 16, "patch_length": 4, "patch_stride": 4},
        {"past_values": numbers(16, 3)},
    ),
    "InformerModel": (_SERIES, _PAST),
    "TimeSeriesTransformerModel": (_SERIES, _PAST),
    "DecisionTransformerModel": (
        {"state_dim": 5, "act_dim": 3, "n_head": 4, "max_ep_len": 20},
        {
            "states": numbers(6, 5),
            "actions": numbers(6, 3),
            "rewards": numbers(6, 1),
            "returns_to_go": numbers(6, 1),
            "timesteps": lambda: torch.arange(6).expand(BATCH, 6),
        },
    ),
}
_IMAGE_AND_TEXT: dict[str, Any] = {
    "hidden_states": numbers(4, 8, 8),
    "encoder_hidden_states": numbers(5, 24),
    "timestep": _two,
}
_DIT: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "sample_size": 8,
    "patch_size": 2,
}
_DIFFUSERS: dict[str, tuple[dict[str, Any], Any]] = {
    "UNet2DConditionModel": (
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 24,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        },
        {"sample": numbers(4, 8, 8), "timestep": _two, "encoder_hidden_states": numbers(5, 24)},
    ),
    "UNet2DModel": (
        {
            "sample_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            "norm_num_groups": 8,
        },
        {"sample": numbers(3, 8, 8), "timestep": _two},
    ),
    "DiTTransformer2DModel": (
        {"num_layers": 2, "norm_num_groups": 4, "num_embeds_ada_norm": 10, **_DIT},
        {"hidden_states": numbers(4, 8, 8), "timestep": _two, "class_labels": _two},
    ),
    "SD3Transformer2DModel": (
        {
            "num_layers": 2,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 12,
            "out_channels": 4,
            "pos_embed_max_size": 8,
            **_DIT,
        },
        {"pooled_projections": numbers(12), **_IMAGE_AND_TEXT},
    ),
    "FluxTransformer2DModel": (
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        },
        {
            "hidden_states": numbers(9, 4),
            "encoder_hidden_states": numbers(5, 24),
            "pooled_projections": numbers(12),
            "timestep": lambda: torch.tensor([0.3, 0.5]),
            "img_ids": lambda: torch.rand(9, 3),
            "txt_ids": lambda: torch.zeros(5, 3),
        },
    ),
    "PixArtTransformer2DModel": (
        {
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "norm_num_groups": 4,
            "use_additional_conditions": False,
            **_DIT,
        },
        {"added_cond_kwargs": lambda: {"resolution": None, "aspect_ratio": None}, **_IMAGE_AND_TEXT},
    ),
    "AuraFlowTransformer2DModel": (
        {
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 64,
            **_DIT,
        },
        _IMAGE_AND_TEXT,
    ),
    "SanaTransformer2DModel": (
        {
            **_DIT,
            "out_channels": 4,
            "num_layers": 2,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "patch_size": 1,
        },
        _IMAGE_AND_TEXT,
    ),
    "CogVideoXTransformer3DModel": (
        {
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": 24,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "patch_size": 2,
            "time_embed_dim": 8,
            "max_text_seq_length": 5,
        },
        {**_IMAGE_AND_TEXT, "hidden_states": numbers(2, 4, 8, 8)},
    ),
    "WanTransformer3DModel": (
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 4,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 24,
            "freq_dim": 16,
            "ffn_dim": 48,
            "num_layers": 2,
            "cross_attn_norm": True,
            "rope_max_seq_len": 16,
        },
        {**_IMAGE_AND_TEXT, "hidden_states": numbers(4, 2, 8, 8)},
    ),
    "AutoencoderKL": (
        {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 8,
            "latent_channels": 4,
        },
        {"sample": numbers(3, 16, 16)},
    ),
}
_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
_FOUR: dict[str, Any] = {"depths": (1, 1, 1, 1)}
_SWIN: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depths": (2, 1), "num_heads": (2, 4), "window_size": 4}
_TIMM: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny_patch16_224": (_VIT, 32),
    "deit_tiny_distilled_patch16_224": (_VIT, 32),
    "cait_xxs24_224": (_VIT, 32),
    "beit_base_patch16_224": (_VIT, 32),
    "eva02_tiny_patch14_224": (_VIT, 32),
    "vit_relpos_small_patch16_224": (_VIT, 32),
    "vit_base_patch16_siglip_224": (_VIT, 32),
    "vit_small_plus_patch16_dinov3": (_VIT, 32),
    "xcit_nano_12_p16_224": ({"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4}, 32),
    "swin_tiny_patch4_window7_224": (_SWIN, 32),
    "swinv2_tiny_window8_256": (_SWIN, 32),
    "naflexvit_base_patch16_gap": ({"embed_dim": 32, "depth": 2, "num_heads": 4}, 32),
    "coatnet_nano_rw_224": ({"img_size": 64, "embed_dim": (32, 32, 32, 64), "stem_width": 16, **_FOUR}, 64),
    "maxvit_nano_rw_256": ({"img_size": 64, "embed_dim": (32, 32, 64, 64), "stem_width": 16, **_FOUR}, 64),
    "hiera_tiny_224": ({"img_size": (64, 64), "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}, 64),
    "pvt_v2_b0": ({"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), **_FOUR}, 64),
    "levit_128s": (
        {"img_size": 64, "embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": (2, 3, 4), "depth": (1, 1, 1)},
        64,
    ),
    "convnext_atto": ({"dims": (8, 8, 8, 8), **_FOUR}, 64),
    "edgenext_xx_small": ({"dims": (8, 8, 16, 16), **_FOUR}, 64),
    "twins_svt_small": ({"img_size": 64, "embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 4, 4), **_FOUR}, 64),
    "davit_tiny": ({"embed_dims": (16, 16, 32, 32), "num_heads": (2, 2, 4, 4), **_FOUR}, 64),
    "mobilevit_xxs": ({}, 64),
}
_X_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Decoder": {},
    "Encoder": {},
    "Decoder rotary": {"rotary_pos_emb": True},
    "Decoder alibi": {"alibi_pos_bias": True},
    "Decoder relative bias": {"rel_pos_bias": True},
    "Decoder QK-norm": {"attn_qk_norm": True},
    "Decoder grouped keys": {"attn_kv_heads": 2},
    "Decoder one key head": {"attn_one_kv_head": True},
    "Decoder talking heads": {"attn_pre_talking_heads": True},
    "Decoder talking heads behind": {"attn_post_talking_heads": True},
    "Decoder residual attention": {"residual_attn": True},
    "Decoder sparse": {"attn_sparse_topk": 3},
    "Decoder memory keys": {"attn_num_mem_kv": 2},
    "Decoder gated values": {"attn_gate_values": True},
    "Decoder flash": {"attn_flash": True},
    "Decoder soft clamp": {"attn_softclamp_logits": True},
    "Decoder forgetting": {"attn_data_dependent_alibi": True},
    "Decoder sigmoid": {"attn_sigmoid": True},
    "Decoder contextual positions": {"attn_use_cope": True, "attn_cope_max_pos": 8},
    "Decoder laser": {"attn_laser": True},
    "Decoder polar": {"polar_pos_emb": True},
    "Decoder signed weights": {"attn_cog_signed": True},
    "Decoder hyper-connections": {"num_residual_streams": 2},
    "Decoder zero key": {"attn_add_zero_kv": True},
}
_EDGES = ((0, 1, 2, 3, 4, 0, 2), (1, 2, 3, 4, 0, 3, 5))
_GRAPH: dict[str, Any] = {"x": lambda: torch.randn(6, 12), "edge_index": lambda: torch.tensor(_EDGES)}
_TORCH_GEOMETRIC: dict[str, tuple[dict[str, Any], Any]] = {
    "TransformerConv": ({"in_channels": 12, "out_channels": 8, "heads": 4}, _GRAPH),
    "GATConv": ({"in_channels": 12, "out_channels": 8, "heads": 4}, _GRAPH),
    "GATv2Conv": ({"in_channels": 12, "out_channels": 8, "heads": 4}, _GRAPH),
    "GCNConv": ({"in_channels": 12, "out_channels": 8}, _GRAPH),
}


def _picture(size: int) -> dict[str, Any]:
    return {"*": lambda: (torch.randn(BATCH, 3, size, size),)}


_BY_NAME = (_DECODERS, _HYBRIDS, _ENCODERS, _SEQUENCE_TO_SEQUENCE, _VISION)
ARCHITECTURES: tuple[Architecture, ...] = (
    *(Architecture(name, "transformers") for names in _BY_NAME for name in names.split()),
    *_all("transformers", _TRANSFORMERS),
    *_all("diffusers", _DIFFUSERS),
    *_all("timm", {name: (options, _picture(size)) for name, (options, size) in _TIMM.items()}),
    *_all("x_transformers", {name: (options, {"*": lambda: (tokens(),)}) for name, options in _X_TRANSFORMERS.items()}),
    *_all("torch_geometric", _TORCH_GEOMETRIC),
)
"""Names are unique; a library that is not installed is named in the table."""
