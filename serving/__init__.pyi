from .batching import Batcher as Batcher
from .batching import BatcherClosedError as BatcherClosedError
from .batching import PendingReply as PendingReply
