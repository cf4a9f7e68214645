"""The thread that answers other hosts asks for a bucket's weights while the worker's own thread may be doing so."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

import lightwork
from lightwork.state import weights as weights_module
from tests.training import new_folder, run_team


def test_who_asks_while_another_thread_makes_the_list_gets_all_of_it() -> None:
    def job() -> None:
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = lightwork.distribute(model, optimizer, global_batch=2, precision="bf16", run_dir=str(new_folder()))
        weights = run._engine.state.weights
        weights._stretches_of.clear()
        span_of, seen = weights_module.span_of, []
        first = threading.Lock()

        def interrupted(*arguments: Any) -> Any:
            if first.acquire(blocking=False):  # once, in the middle of the first list
                span = span_of(*arguments)
                second = threading.Thread(target=lambda: seen.append(list(weights.stretches(0))))
                second.start()
                second.join()
                return span
            return span_of(*arguments)

        weights_module.span_of = interrupted
        own = weights.stretches(0)
        weights_module.span_of = span_of
        assert seen == [own]
        assert own
        assert weights.stretches(0) == own
        run.close()

    run_team(1, job)
