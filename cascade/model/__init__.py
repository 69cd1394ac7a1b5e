"""The model itself: backbones, masks, routers, fusion and heads."""
