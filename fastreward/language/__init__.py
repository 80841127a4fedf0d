"""The loss language: operators, graph, simplification, derivative, and the program that backends run."""
