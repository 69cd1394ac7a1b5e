"""The ASGI front end: FastAPI over a batcher, served by uvicorn, restarted by a supervisor."""
