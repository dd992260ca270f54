from .dataset import AgeVlmDatasetCard as AgeVlmDatasetCard
from .dataset import render_dataset_card as render_dataset_card
from .dataset import write_dataset_card as write_dataset_card
from .model import AgeVlmModelCard as AgeVlmModelCard
from .model import read_results as read_results
from .model import render_model_card as render_model_card
from .model import write_model_card as write_model_card
