"""From downloaded data to a trained model: recipes, stages, the trainer."""

from moellava.train.adapters import lora_config
from moellava.train.options import Recipe
from moellava.train.recipe import load_recipe, recipe_names
from moellava.train.router_loss import use_router_loss
from moellava.train.run import train
from moellava.train.stage import Plan, Stage, TrainResult, register_stage

__all__ = [
    "Plan",
    "Recipe",
    "Stage",
    "TrainResult",
    "load_recipe",
    "lora_config",
    "recipe_names",
    "register_stage",
    "train",
    "use_router_loss",
]
