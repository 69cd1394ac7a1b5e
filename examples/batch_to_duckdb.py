"""Predict a folder into Parquet and query it with DuckDB: python examples/batch_to_duckdb.py [IMAGES [OUT]]

Run it again after an interruption: finished parts are kept.
"""

import sys
from pathlib import Path

import duckdb

import cascade
from cascade.offline.predict import predict_files

images = sys.argv[1] if len(sys.argv) > 1 else "tests/data/photos"
out = sys.argv[2] if len(sys.argv) > 2 else "runs/predictions"
summary = predict_files(cascade.load("model_store/paper/1"), [images], Path(out), embedding="float16")
print(f"{summary.rows} rows in {out}, errors: {summary.errors or 'none'}")
print(
    duckdb.sql(f"""
        select labels[1].name as label, count(*) as images, round(avg(confidence), 2) as confidence
        from '{out}/*.parquet' where error is null group by label order by images desc, label
    """)
)
