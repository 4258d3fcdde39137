"""The measurements: what they time is checked first, and no number stands without its row.

test_suites.py is about what the suites time, test_results.py about rows and the pages written from
them; test_roofline.py, test_memory_traffic.py, test_compare.py, test_prove.py and
test_codegen_rows.py each about the command of that name.
"""
