"""`prefray inspect`: what is odd about prepared data, and a number for every row that rows can be selected by.

parts.py       parts of a store, and their columns of lists
measures.py    lengths, and what the reference's scores say of a pair
shingles.py    runs of tokens of each row, and their MinHash
duplicates.py  groups of near duplicates
contents.py    prompts, near duplicates, ends and first tokens, over all rows
overlap.py     8-grams that rows share with files of benchmarks
columns.py     these columns in Parquet, complete or absent, computed once
selection.py   the rows that `select:` keeps
rules.py       findings, by rules
strangest.py   the strangest rows of each kind
result.py      the result; inspect.py computes it
"""
