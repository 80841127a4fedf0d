"""What recipes of several families share: options and trees."""
