"""Several machines with Ray: the ASGI application as a Serve deployment, and offline prediction as a Data job."""
