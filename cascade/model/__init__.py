"""What is computed: backbones, masks, routers, fusion and heads."""
