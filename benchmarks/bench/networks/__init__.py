"""The networks that learn the problems of the bench."""
