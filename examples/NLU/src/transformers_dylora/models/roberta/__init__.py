from .modeling_roberta import RobertaForSequenceClassification, RobertaModel

__all__ = ["RobertaForSequenceClassification", "RobertaModel"]
