"""The composition root: `distribute` joins a team and returns a `Run`; `Step` interleaves data and engine."""
