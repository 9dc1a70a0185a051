// bfloat16 weights with float32 inputs, for instruction sets without a product of bfloat16. Included as vector.h is.

static void matmul_panel_bf16(const Matmul& call, const MatmulInputs& inputs, int64_t panel, int64_t begin,
                              int64_t end) {
  multiply_panel<Bf16Panel>(call, inputs, call.num_inputs, panel, begin, end);
}
