"""Executors: ways to run a pass, or a part of one, under a mask. One module each, one interface.

swap(mask)            make ``mask`` (None: the plain backbone) the one that the next runs use
run(x, start, stop)   stages ``start`` to ``stop`` of the backbone, see ``Backbone.run``
"""
