"""The MLX backend: Apple GPUs through Metal, NVIDIA GPUs and the CPU, through one code path.

device: which device this is, its memory, and what MLX's errors mean.
load: from a plan to a model with its adapter; mlx-lm's model classes read the folder.
check: does a model taken apart do what it does whole?
decoder: an mlx-lm model taken apart into what comes before its layers, the layers, and what comes after.
projection: linear layers, frozen or packed, with or without an adapter.
attention: attention whose backward pass holds a block of scores.
loss: the loss in slices, with its gradient in the same pass.
engine: forward and backward, layer by layer.
optimizer: AdamW on the adapter.
learner: the interface of `burnish.backends.base`.
generate: answers, token by token, with a key-value cache.
prefix: the beginning of a prompt that was read before, kept as its cache.
quantize: a model folder packed to 4 or 8 bits, tensor by tensor.
"""
