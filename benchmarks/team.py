"""One worker of lightwork, under `lightwork run`: the peers' model and samples, by the public contract alone."""

from __future__ import annotations

import time

import torch
from torch.utils.data import TensorDataset

import lightwork
from measure import Recorder, parse_arguments
from models import LEARNING_RATE, make_data, make_model


def main() -> None:
    parser = parse_arguments(__doc__)
    parser.add_argument("--micro-batch", type=int, required=True)
    parser.add_argument("--slowdown", type=float, default=1.0, help="how many times longer rank 1 takes")
    arguments = parser.parse_args()

    model = make_model(arguments.model)
    dataset = TensorDataset(*make_data(arguments.model, arguments.batch, arguments.steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    run = lightwork.distribute(
        model,
        optimizer,
        global_batch=arguments.batch,
        micro_batch=arguments.micro_batch,
        seed=0,
        precision=arguments.precision,
        run_dir=str(arguments.out / "run"),
    )
    recorder = Recorder(arguments.out, rank=run.rank, world_size=run.world_size)
    pause = arguments.slowdown - 1 if run.rank == 1 else 0
    for step in run.steps(dataset, max_steps=arguments.steps, shuffle=False):
        for batch in step:
            start = time.perf_counter()
            step.backward(model(*batch))
            if pause:
                time.sleep(pause * (time.perf_counter() - start))
        recorder.end_step(step.loss)
    setting = f"micro-batch {arguments.micro_batch}"
    recorder.finish(setting + (f", rank 1 {arguments.slowdown:g} x slower" if arguments.slowdown > 1 else ""))


if __name__ == "__main__":
    main()
