"""From measurements to rows, and from rows to the tables and plots of the documents.

collect.py turns reports and runs into rows, codegen.py and properties.py do so for what the kernels
compile to and for drawn test cases. documents.py (`python -m benchmarks.report`) writes README.md
and docs/ anew, with the tables of tables.py and published.py and the pictures of plots.py.
"""
