"""More than one machine, by Ray: the ASGI application as a Serve deployment, and offline prediction as a Data job."""
