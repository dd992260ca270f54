from .attention import Attention as Attention
from .attention import attend as attend
from .generation import load_model as load_model
