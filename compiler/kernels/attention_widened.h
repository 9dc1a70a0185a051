// Pages of bfloat16 are widened to float32, for instruction sets without a product of bfloat16. Included as vector.h is.

using HalfElements = WidenedElements;  // those of pages of bfloat16
