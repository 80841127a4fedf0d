// Scratch and instructions of a pass for one thread; and programs without reductions for one token at a time.
#include "cpu/program/registers.hpp"

#include <cstring>

namespace fastreward::FASTREWARD_ISA::program {
namespace {

using namespace simd;

bool is_sequence(OperandKind kind) {
  return kind == OperandKind::sequence_value || kind == OperandKind::sequence_mask || kind == OperandKind::coefficient;
}

}  // namespace

// ----------------------------------------------------------------------------------------------------------- layout
std::int64_t Registers::lines_of(OperandKind kind) {
  switch (kind) {
    case OperandKind::slot:
    case OperandKind::input:
    case OperandKind::output: return kTileBytes / static_cast<std::int64_t>(sizeof(Line));
    case OperandKind::reduction: return sizeof(Accumulator) / sizeof(Line);
    case OperandKind::sequence_value:
    case OperandKind::coefficient:
    case OperandKind::carry: return 1;
    case OperandKind::mask:
    case OperandKind::sequence_mask: return 0;
  }
  return 0;
}

Registers::Sizes::Sizes(const TokenStep& step) {
  for (const TokenOperand& o : step.operands) {
    lines += lines_of(o.kind);
    if (o.kind == OperandKind::mask && o.index >= masks) masks = o.index + 1;
    sequence_masks += o.kind == OperandKind::sequence_mask;
    inputs += o.kind == OperandKind::input;
    outputs += o.kind == OperandKind::output;
    sequence_values += is_sequence(o.kind) && o.index < 0;
  }
}

Registers::Registers(const TokenStep& step, const float* const* inputs, float* const* outputs)
    : step_(step),
      inputs_(inputs),
      outputs_(outputs),
      sizes_(step),
      lines_(sizes_.lines),
      masks_((1 + sizes_.masks + sizes_.sequence_masks) * kChunkVectors),
      at_(size()),
      mask_(size()),
      tensors_(sizes_.inputs + sizes_.outputs),
      of_sequence_(sizes_.sequence_values) {
  Line* line = lines_.data();
  Tensor *input = tensors_.data(), *output = input + sizes_.inputs;
  int sequence_masks = 0, sequences = 0;
  for (int k = 0; k < size(); ++k) {
    at_[k] = line->bytes;
    line += lines_of(kind(k));
    mask_[k] = 1 + (kind(k) == OperandKind::sequence_mask ? sizes_.masks + sequence_masks++ : index(k));
    if (is_sequence(kind(k)) && index(k) < 0) of_sequence_[sequences++] = k;
    if (!is_tensor(kind(k))) continue;
    std::memset(at_[k], 0, kTileBytes);
    *(kind(k) == OperandKind::input ? input++ : output++) = {tensor(k), reinterpret_cast<float*>(at_[k]), index(k)};
  }
}

char* Registers::tensor(int k) const {
  if (inputs_ == nullptr) return nullptr;
  if (kind(k) == OperandKind::output) return reinterpret_cast<char*>(outputs_[index(k)]);
  return const_cast<char*>(reinterpret_cast<const char*>(inputs_[index(k)]));
}

// ----------------------------------------------------------------------------------------------------------- values
void Registers::broadcast(int k, double value) {
  if (kind(k) == OperandKind::sequence_value) {
    store(reinterpret_cast<float*>(at_[k]), f32(static_cast<float>(value)));
    return;
  }
  if (kind(k) == OperandKind::coefficient) {
    *reinterpret_cast<double*>(at_[k]) = value;
    return;
  }
  for (int v = 0; v < kChunkVectors; ++v) mask(k)[v] = value != 0.0 ? kAllLanes : Word{0};
}

void Registers::set_numbers(const double* numbers) {
  for (int k = 0; k < size(); ++k)
    if (is_sequence(kind(k)) && index(k) >= 0) broadcast(k, numbers[index(k)]);
}

void Registers::set_sequence(const SequenceValues& values, std::int64_t sequence) {
  for (int n = 0; n < sizes_.sequence_values; ++n)
    broadcast(of_sequence_[n], values.at(index(of_sequence_[n]), sequence));
}

void Registers::begin_sequence() {
  for (int k = 0; k < size(); ++k)
    if (kind(k) == OperandKind::carry) std::memset(at_[k], 0, sizeof(Line));
}

// ----------------------------------------------------------------------------------------------------- instructions
char* Registers::field(int k, bool copies) const {
  if (k < 0) return nullptr;
  if (is_tensor(kind(k)) && !copies) return tensor(k);
  if (kind(k) != OperandKind::mask && kind(k) != OperandKind::sequence_mask) return at_[k];
  return reinterpret_cast<char*>(mask_[k] * kChunkVectors * static_cast<std::int64_t>(sizeof(Word)));
}

Variant Registers::variant_of(const TokenInstruction& i, bool masked) const {
  const auto place = [&](int k) {
    if (k < 0) return Place::none;
    if (kind(k) == OperandKind::sequence_value || kind(k) == OperandKind::coefficient) return Place::sequence;
    return is_tensor(kind(k)) ? Place::tensor : Place::slot;
  };
  Variant variant;
  variant.w = place(i.w), variant.x = place(i.x), variant.y = place(i.y);
  variant.keeps = i.k >= 0;
  variant.masked = masked;
  return variant;
}

Registers::Program Registers::link(bool masked, bool copies) const {
  const int size = step_.tile.size, wanted = copies ? 0 : sizes_.inputs;
  Program program{Buffer<Instruction>(size + wanted + 1)};
  Instruction* out = program.code.data();
  int fetched = 0;
  for (int n = 0; n < size; ++n) {
    for (; fetched * size < n * wanted; ++fetched)  // evenly among the others
      *out++ = {&fetch, nullptr, tensors_[fetched].base, nullptr, 0, nullptr};
    const TokenInstruction& i = step_.tile[n];
    *out++ = {operator_of(i.op, variant_of(i, masked)),
              field(i.w, copies),
              field(i.x, copies),
              field(i.y, copies),
              reinterpret_cast<std::int64_t>(field(i.z, copies)),
              field(i.k, copies)};
  }
  *out = {&finish, nullptr, nullptr, nullptr, 0, nullptr};
  return program;
}

void Registers::choose_stores(const Program& program, bool masked, std::int64_t place) const {
  Instruction* i = program.code.data();
  for (const TokenInstruction& from : step_.tile) {
    while (i->run == &fetch) ++i;
    if (stores(from.op)) {
      Variant variant = variant_of(from, masked);
      variant.streamed = on_vectors(i->x + place);
      i->run = operator_of(from.op, variant);
    }
    ++i;
  }
}

// -------------------------------------------------------------------------------------------------- single tokens
struct TokenProgram::Linked {
  explicit Linked(const TokenStep& step) : registers(step, nullptr, nullptr), program(registers.link(false, true)) {}
  Registers registers;
  Registers::Program program;
};

TokenProgram::TokenProgram(const ProgramCode& code, const double* scalars)
    : code_(code), numbers_(code.numbers), linked_(new Linked(code.stages[0].tokens[0])) {
  for (const Constant& c : code.constants) numbers_[c.number] = c.value;
  for (int k = 0; k < code.scalars.size; ++k) numbers_[code.scalars[k]] = scalars[k];
  linked_->registers.set_numbers(numbers_.data());
}

TokenProgram::~TokenProgram() { delete linked_; }

void TokenProgram::run(const float* const* inputs, float* outputs) {
  const Registers& registers = linked_->registers;
  for (const Tensor& x : registers.inputs()) *x.copy = *inputs[x.index];
  registers.run(linked_->program, 0, 0, 0);
  for (int k = 0; k < code_.outputs.size; ++k)
    if (code_.outputs[k] != kTokenOutput) outputs[k] = static_cast<float>(numbers_[code_.outputs[k]]);
  for (const Tensor& x : registers.outputs()) outputs[x.index] = *x.copy;
}

}  // namespace fastreward::FASTREWARD_ISA::program
