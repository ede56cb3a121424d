"""Text for the lessons: a corpus, a small language model, and a task to fine-tune it to."""
