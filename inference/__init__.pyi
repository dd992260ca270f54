from .attention import Attention as Attention
from .attention import attend as attend
from .generation import load_model as load_model
from .grounding import Calibration as Calibration
from .grounding import Grounded as Grounded
from .grounding import find_calibration as find_calibration
from .grounding import ground as ground
from .grounding import ground_reply as ground_reply
