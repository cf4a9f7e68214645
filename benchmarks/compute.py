"""Forward and backward alone, in as many processes as there are workers: what a step would cost if the rest were free.

The weights are as lightwork has them (under bf16: bf16 weights, norms in fp32, autocast). Nothing is exchanged and
nothing is updated; every process computes its own share of the global batch, all at the same time.
"""

from __future__ import annotations

import os

import torch

from measure import Recorder, parse_arguments
from models import make_data, make_model, to_bf16


def main() -> None:
    parser = parse_arguments(__doc__)
    parser.add_argument("--micro-batch", type=int, required=True)
    arguments = parser.parse_args()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    share, micro_batch = arguments.batch // world_size, arguments.micro_batch
    torch.set_num_threads(1)

    bf16 = arguments.precision == "bf16"
    model = make_model(arguments.model)
    if bf16:
        to_bf16(model)
    data = make_data(arguments.model, arguments.batch, arguments.steps)
    recorder = Recorder(arguments.out, rank=rank, world_size=world_size)
    recorder.meet("start")
    for step in range(arguments.steps):
        start = step * arguments.batch + rank * share
        losses = []
        for first in range(start, start + share, micro_batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(*(tensor[first : first + micro_batch] for tensor in data))
            loss.backward()
            losses.append(loss.item())
        model.zero_grad(set_to_none=True)
        recorder.end_step(sum(losses) / len(losses))
    recorder.finish(f"micro-batch {micro_batch}, no exchange, no update")


if __name__ == "__main__":
    main()
