# Topics of BBC News from scratch on a laptop: a one-layer transformer, about a minute on 2 CPU cores.
# Chosen on val (seeds 1-3); README.md and NOTES.md have the figures.
dataset = "bbc"
