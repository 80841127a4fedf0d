// fastreward._core.Program and its program_* functions: see csrc/cpu/program/program.hpp.
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/addresses.hpp"
#include "bindings/registry.hpp"
#include "cpu/program/program.hpp"

namespace fastreward {
namespace {

using SequenceCode = std::vector<std::array<int, 5>>;
// side, whether with scans, whether reverse, operands, tile instructions, chunk instructions, reductions
using StepCode = std::tuple<int, bool, bool, std::vector<std::array<int, 2>>, std::vector<std::array<int, 6>>,
                            std::vector<std::array<int, 4>>, std::vector<std::array<int, 2>>>;
using StageCode = std::pair<std::vector<StepCode>, SequenceCode>;

template <class T>
Span<T> span(const std::vector<T>& v) {
  return {v.data(), static_cast<int>(v.size())};
}

std::vector<SequenceInstruction> sequence_instructions(const SequenceCode& code) {
  std::vector<SequenceInstruction> out;
  for (const auto& [op, result, a, b, c] : code) out.push_back({static_cast<SequenceOp>(op), result, a, b, c});
  return out;
}

// The arrays behind a ProgramCode. Instructions come from fastreward/cpu/program/encode.py, which is trusted to number
// operands and places as it declares them.
class Program {
 public:
  Program(int sides, int numbers, int columns, const std::vector<std::pair<int, double>>& constants,
          std::vector<int> scalars, const std::vector<std::pair<int, int>>& inputs, const SequenceCode& prologue,
          const std::vector<StageCode>& stages, std::vector<int> outputs, std::vector<int> batch)
      : scalars_(std::move(scalars)), outputs_(std::move(outputs)), batch_(std::move(batch)) {
    for (const auto& [number, value] : constants) constants_.push_back({number, value});
    for (const auto& [level, place] : inputs) inputs_.push_back({static_cast<InputLevel>(level), place});
    prologue_ = sequence_instructions(prologue);
    parts_.resize(stages.size());
    for (std::size_t i = 0; i < stages.size(); ++i) {
      Stage& own = parts_[i];
      own.sequences = sequence_instructions(stages[i].second);
      own.parts.resize(stages[i].first.size());
      for (std::size_t k = 0; k < own.parts.size(); ++k) own.tokens.push_back(step(stages[i].first[k], own.parts[k]));
      stages_.push_back({span(own.tokens), span(own.sequences)});
    }
    code_ = {sides,         numbers,         columns,       span(constants_), span(scalars_),
             span(inputs_), span(prologue_), span(stages_), span(outputs_),   span(batch_)};
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  const ProgramCode& code() const { return code_; }

 private:
  struct Step {
    std::vector<TokenOperand> operands;
    std::vector<TokenInstruction> tile;
    std::vector<MaskInstruction> chunk;
    std::vector<Reduction> reductions;
  };
  struct Stage {
    std::vector<Step> parts;
    std::vector<TokenStep> tokens;
    std::vector<SequenceInstruction> sequences;
  };

  static TokenStep step(const StepCode& from, Step& own) {
    const auto& [side, scans, reverse, operands, tile, chunk, reductions] = from;
    for (const auto& [kind, index] : operands) own.operands.push_back({static_cast<OperandKind>(kind), index});
    for (const auto& [op, w, x, y, z, k] : tile) own.tile.push_back({static_cast<TokenOp>(op), w, x, y, z, k});
    for (const auto& [op, x, y, z] : chunk) own.chunk.push_back({static_cast<MaskOp>(op), x, y, z});
    for (const auto& [kind, place] : reductions) own.reductions.push_back({static_cast<ReductionKind>(kind), place});
    return {side, scans, reverse, span(own.operands), span(own.tile), span(own.chunk), span(own.reductions)};
  }

  std::vector<Constant> constants_;
  std::vector<int> scalars_;
  std::vector<ProgramInput> inputs_;
  std::vector<SequenceInstruction> prologue_;
  std::vector<Stage> parts_;
  std::vector<ProgramStage> stages_;
  std::vector<int> outputs_, batch_;
  ProgramCode code_;
};

using TokensCode = std::tuple<std::int64_t, std::int64_t, Address, Address, int>;

ProgramTokens tokens_of(const TokensCode& from) {
  const auto& [sequences, columns, cu_seqlens, mask, mask_kind] = from;
  const MaskView view{at<const void>(mask), static_cast<MaskKind>(mask_kind)};
  return {sequences, columns, at<const std::int64_t>(cu_seqlens), view};
}

std::int64_t count_tokens(const ProgramTokens& tokens) {
  return tokens.cu_seqlens != nullptr ? tokens.cu_seqlens[tokens.sequences] : tokens.sequences * tokens.columns;
}

// Whatever the instructions read or write is there: one per token, per sequence or for the batch.
void check_tensors(const ProgramCall& call, std::int64_t sequences) {
  const ProgramCode& code = *call.code;
  const auto check = [](const char* name, const float* x, std::int64_t count) {
    required<const float>(name, reinterpret_cast<Address>(x), count);
  };
  for (int k = 0; k < code.inputs.size; ++k) {
    const InputLevel level = code.inputs[k].level;
    if (level != InputLevel::token) check("inputs", call.inputs[k], level == InputLevel::sequence ? sequences : 1);
  }
  for (const ProgramStage& stage : code.stages)
    for (const TokenStep& step : stage.tokens)
      for (const TokenOperand& operand : step.operands) {
        const std::int64_t count = count_tokens(call.sides[step.side]);
        if (operand.kind == OperandKind::input) check("inputs", call.inputs[operand.index], count);
        if (operand.kind == OperandKind::output) check("outputs", call.outputs[operand.index], count);
      }
  for (int k = 0; k < code.outputs.size; ++k)
    if (code.outputs[k] != kTokenOutput) check("outputs", call.outputs[k], sequences);
  check("batch", call.batch, code.batch.size);
}

std::int64_t count_groups(const std::int64_t* groups, std::int64_t sequences) {
  std::int64_t count = 0;
  for (std::int64_t sequence = 0; groups != nullptr && sequence < sequences; ++sequence) {
    if (groups[sequence] < 0 || groups[sequence] >= sequences)
      throw std::invalid_argument("groups: expected numbers from 0 below " + std::to_string(sequences));
    if (groups[sequence] >= count) count = groups[sequence] + 1;
  }
  return count;
}

void run(const Program& program, const std::vector<TokensCode>& sides, const std::vector<Address>& inputs,
         const std::vector<double>& scalars, Address groups, const std::vector<Address>& outputs, Address batch,
         int threads) {
  const pybind11::gil_scoped_release unlocked;
  expect_size("sides", sides.size(), program.code().sides);
  expect_size("inputs", inputs.size(), program.code().inputs.size);
  expect_size("scalars", scalars.size(), program.code().scalars.size);
  expect_size("outputs", outputs.size(), program.code().outputs.size);
  std::vector<ProgramTokens> tokens;
  for (const TokensCode& side : sides) tokens.push_back(tokens_of(side));
  std::vector<const float*> sources;
  for (const Address address : inputs) sources.push_back(at<const float>(address));
  std::vector<float*> results;
  for (const Address address : outputs) results.push_back(at<float>(address));
  ProgramCall call;
  call.code = &program.code();
  call.sides = tokens.data();
  call.inputs = sources.data();
  call.scalars = scalars.data();
  call.groups = at<const std::int64_t>(groups);
  call.group_count = count_groups(call.groups, tokens[0].sequences);
  call.outputs = results.data();
  call.batch = at<float>(batch);
  call.threads = threads;
  check_tensors(call, tokens[0].sequences);
  FASTREWARD_DISPATCH(program_run)(call);
}

void scale(const TokensCode& tokens, Address saved, Address sequence_weight, double factor, Address out, int threads) {
  const pybind11::gil_scoped_release unlocked;
  const ProgramTokens side = tokens_of(tokens);
  const std::int64_t count = count_tokens(side);
  FASTREWARD_DISPATCH(program_scale)
  (side, required<const float>("saved", saved, count), at<const float>(sequence_weight), static_cast<float>(factor),
   required<float>("out", out, count), threads);
}

void broadcast_to_tokens(const TokensCode& tokens, Address sequence_values, double factor, Address out, int threads) {
  const pybind11::gil_scoped_release unlocked;
  const ProgramTokens side = tokens_of(tokens);
  const auto* values = required<const float>("sequence_values", sequence_values, side.sequences);
  auto* to = required<float>("out", out, count_tokens(side));
  FASTREWARD_DISPATCH(program_broadcast_to_tokens)(side, values, static_cast<float>(factor), to, threads);
}

double threshold(const TokensCode& tokens, Address x, double bound, bool share, int threads) {
  const pybind11::gil_scoped_release unlocked;
  const ProgramTokens side = tokens_of(tokens);
  const auto* values = required<const float>("x", x, count_tokens(side));
  return static_cast<double>(FASTREWARD_DISPATCH(program_threshold)(side, values, bound, share, threads));
}

#define FASTREWARD_NAME(name, ...) #name,
pybind11::dict numbered(const std::vector<const char*>& names) {
  pybind11::dict out;
  int number = 0;
  for (const char* name : names) out[name] = number++;
  return out;
}

}  // namespace

void register_program(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<Program>(m, "Program", "Instructions of a program of the loss language, made by fastreward/cpu/program/encode.py.")
      .def(py::init<int, int, int, const std::vector<std::pair<int, double>>&, std::vector<int>,
                    const std::vector<std::pair<int, int>>&, const SequenceCode&, const std::vector<StageCode>&,
                    std::vector<int>, std::vector<int>>(),
           py::kw_only(), py::arg("sides"), py::arg("numbers"), py::arg("columns"), py::arg("constants"), py::arg("scalars"),
           py::arg("inputs"), py::arg("prologue"), py::arg("stages"), py::arg("outputs"), py::arg("batch"))
      .def_property_readonly("code", [](const Program& p) { return reinterpret_cast<Address>(&p.code()); },
                             "Address of the ProgramCode, for as long as this lives.");
  m.def("program_token_operators", [] { return numbered({FASTREWARD_TOKEN_OPERATORS(FASTREWARD_NAME)}); },
        "Numbers of the token operators, by name.");
  m.def("program_mask_operators", [] { return numbered({FASTREWARD_MASK_OPERATORS(FASTREWARD_NAME)}); },
        "Numbers of the operators on a chunk's masks, by name.");
  m.def("program_sequence_operators", [] { return numbered({FASTREWARD_SEQUENCE_OPERATORS(FASTREWARD_NAME)}); },
        "Numbers of the sequence operators, by name.");
  m.def("program_run", &run, py::kw_only(), py::arg("program"), py::arg("sides"), py::arg("inputs"),
        py::arg("scalars"), py::arg("groups"), py::arg("outputs"), py::arg("batch"), py::arg("threads"));
  m.def("program_threshold", &threshold, py::arg("tokens"), py::arg("x"), py::arg("bound"), py::arg("share"),
        py::arg("threads"), "The x from which tokens are dropped, or of a share of the largest: see program.hpp.");
  m.def("program_scale", &scale, py::arg("tokens"), py::arg("saved"), py::arg("sequence_weight"), py::arg("factor"),
        py::arg("out"), py::arg("threads"), "out = saved * sequence_weight[sequence] * factor; a 0 stays 0.");
  m.def("program_broadcast_to_tokens", &broadcast_to_tokens, py::arg("tokens"), py::arg("sequence_values"),
        py::arg("factor"), py::arg("out"), py::arg("threads"),
        "out = sequence_values[sequence] * factor on valid tokens, 0 elsewhere.");
}

}  // namespace fastreward
