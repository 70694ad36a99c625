"""burnish fine-tunes language models with LoRA on the machine you have.

Importing it loads no framework; `burnish.backends.open` does, for the backend that a plan names.
"""

__version__ = "0.1.0"
