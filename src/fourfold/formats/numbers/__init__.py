"""The arithmetic that formats share: elements, scales, packing, blocks, and the survey that compares them."""
