"""What the lessons need: data, classifiers, training, figures, claims. It uses the mathematics, never the reverse."""
