"""The ASGI front end: FastAPI over a batcher, uvicorn around it, a supervisor around that."""
