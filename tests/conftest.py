"""Every test forks its teams from this process; what it imports here, they need not import again."""

import torch
import torch._dynamo  # the first optimizer of a process imports it, 70 MB and two seconds

torch.set_num_threads(1)  # a forked process can not use the thread pool of its parent
