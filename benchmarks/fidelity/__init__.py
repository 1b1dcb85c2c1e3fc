"""The effect of AdvProp at CIFAR scale: recipes, seeds, corruptions, attacks and exported files."""
