"""The instruments: what did the hardware give? They stand above the training loop, and nothing below knows them."""
