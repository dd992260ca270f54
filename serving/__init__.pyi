from .batching import Batcher as Batcher
from .batching import PendingReply as PendingReply
