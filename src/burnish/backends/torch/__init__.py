"""The torch backend: CUDA, MPS and CPU through one device parameter.

`load` makes the model and its adapter, `learner` is the interface, `lora`, `loss` and `attention` are the
engine, `generate` answers, `device` is the one place that asks which device this is.
"""
