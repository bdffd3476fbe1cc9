"""The files of tensors that allot writes, and the reader of all of them."""
