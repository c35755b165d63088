"""Parts of the training of sticker-clip."""
