def test_x(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    w = SummaryWriter(str(tmp_path))
    w.add_scalar("a", 1.0, 1, walltime=0.0)
    w.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    e = EventAccumulator(str(tmp_path))
    e.Reload()
    print(e.Scalars("a"))
    import os

    print(os.listdir(tmp_path))
    import pathlib

    print([p.read_bytes() for p in pathlib.Path(tmp_path).iterdir()])
