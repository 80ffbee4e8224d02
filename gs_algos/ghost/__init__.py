"""Makes some channels of convolutions from others, by depthwise convolutions (GhostNet)."""
