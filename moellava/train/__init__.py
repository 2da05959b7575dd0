"""From downloaded data to a trained model: recipes, stages, the trainer."""

from moellava.train.recipe import Recipe, load_recipe, recipe_names
from moellava.train.run import TrainResult, train

__all__ = ["Recipe", "TrainResult", "load_recipe", "recipe_names", "train"]
