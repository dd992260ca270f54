from .attention import attend as attend
from .attention import phrase_maps as phrase_maps
from .benchmark import Question as Question
from .benchmark import answer as answer
from .benchmark import load_model as load_model
from .cv_bench import evaluate_cv_bench as evaluate_cv_bench
from .pope import evaluate_pope as evaluate_pope
from .scenes import evaluate_scenes as evaluate_scenes
