"""The language-model experiments of lessons 06 and 07, and their shipped record."""
