"""A search index over the embeddings of an offline job: FAISS with cosine similarity, and the rows' columns.

memory     an index in memory: search, filters, chunks
files      its folder: card, FAISS's file and rows, replaced atomically
update     build, add, remove
vectors    FAISS's indexes by kind
metadata   columns of a table of the user's, by path
where      conditions on columns
neighbors  near-duplicates and outliers
live       an index that follows its folder, for a server

The names below are the interface.
"""

from cascade.offline.index.files import read as read
from cascade.offline.index.memory import About as About
from cascade.offline.index.memory import Index as Index
from cascade.offline.index.memory import search as search
from cascade.offline.index.neighbors import duplicates as duplicates
from cascade.offline.index.neighbors import outliers as outliers
from cascade.offline.index.update import add as add
from cascade.offline.index.update import add_images as add_images
from cascade.offline.index.update import build as build
from cascade.offline.index.update import remove as remove
from cascade.offline.index.vectors import Kind as Kind
