"""`burnish selftest`: does burnish compute rightly on this very machine?

    report = selftest("auto", "auto", quick=False, heard=print)       # in run.py

A small random model is built, and everything that a run rests on is done with it on this machine's own device
and held against numbers that come another way: a GPU's against the CPU's in float32, a CPU's against the
NumPy reference. Nothing is downloaded and nothing is left.

Reading order: `report` (what is said), `world` (the model and the rows), `lab` (one backend on one device),
`limits` (how far apart is wrong), `checks` and `whole` (what is looked at), `child` (the process that looks),
`run` (all of it).
"""
