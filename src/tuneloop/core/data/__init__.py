"""Chat data before anything runs: reading files of every format row by row, the rules that a row must keep,
what can be said over whole files, and the repairs that change no meaning.

Read by the command line, the server and the steps. Never imports torch, transformers or tokenizers; pyarrow
only inside the functions that read Parquet.
"""
