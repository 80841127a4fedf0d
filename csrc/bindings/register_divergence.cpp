// fastreward._core.divergence_*: see csrc/cpu/divergence/divergence.hpp.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "bindings/addresses.hpp"
#include "bindings/registry.hpp"
#include "cpu/divergence/divergence.hpp"

namespace fastreward {
namespace {

constexpr int kValues = 8, kIndices = 2;  // rows of `values` and `indices`

// Numbers of log_p, log_q, p, q among a program's inputs, -1: not read.
using Places = std::array<int, 4>;

// The call's rows and what they point to.
struct Rows {
  DivergenceRows in;
  std::vector<const float*> inputs;

  Rows(const LogprobsRows& student, const LogprobsRows& teacher, Address code, const Places& made,
       const std::vector<Address>& addresses, const std::vector<double>& scalars) {
    in.student = student;
    in.teacher = teacher;
    in.code = required<const ProgramCode>("code", code, 1);
    in.log_p = made[0], in.log_q = made[1], in.p = made[2], in.q = made[3];
    expect_size("inputs", addresses.size(), in.code->inputs.size);
    expect_size("scalars", scalars.size(), in.code->scalars.size);
    if (in.code->stages.size != 1 || in.code->stages[0].tokens.size != 1)
      throw std::invalid_argument("code: expected a program of one pass");
    if (teacher.rows != student.rows || teacher.columns != student.columns)
      throw std::invalid_argument("teacher: expected as many rows and columns as the student has");
    for (int k = 0; k < in.code->inputs.size; ++k) {
      const bool own = std::find(made.begin(), made.end(), k) != made.end();
      if (own != (in.code->inputs[k].level == InputLevel::token))
        throw std::invalid_argument("made: expected the places of all inputs per token");
      inputs.push_back(required<const float>("inputs", addresses[static_cast<std::size_t>(k)], own ? 0 : student.rows));
    }
    required<const void>("student", reinterpret_cast<Address>(student.logits), student.rows * student.columns);
    required<const void>("teacher", reinterpret_cast<Address>(teacher.logits), student.rows * student.columns);
    required<const void>("labels", reinterpret_cast<Address>(student.labels), student.rows);
    required<const void>("labels", reinterpret_cast<Address>(teacher.labels), student.rows);
    in.inputs = inputs.data();
    in.scalars = scalars.data();
  }
};

// relative_p, relative_q, log_p, log_q, constant of an output.
using Moments = std::array<double, 5>;
// A product's number, its factor, and the numbers of the inputs that it is multiplied by.
using Term = std::tuple<int, double, std::vector<int>>;

void forward(const LogprobsRows& student, const LogprobsRows& teacher, Address code, const Places& made,
             const std::vector<Address>& inputs, const std::vector<double>& scalars,
             const std::vector<Moments>& moments, int student_flags, int teacher_flags, bool known, Address student_values, Address teacher_values, Address student_indices,
             Address teacher_indices, const std::vector<Address>& outputs) {
  const pybind11::gil_scoped_release unlocked;
  const Rows rows(student, teacher, code, made, inputs, scalars);
  DivergenceForward call;
  call.in = rows.in;
  call.student_flags = student_flags;
  call.teacher_flags = teacher_flags;
  call.known = known;
  call.student_values = required<float>("student_values", student_values, kValues * student.rows);
  call.teacher_values = required<float>("teacher_values", teacher_values, kValues * student.rows);
  if (!known) {
    call.student_indices = required<std::int64_t>("student_indices", student_indices, kIndices * student.rows);
    call.teacher_indices = required<std::int64_t>("teacher_indices", teacher_indices, kIndices * student.rows);
  }
  expect_size("outputs", outputs.size(), call.in.code->outputs.size);
  std::vector<float*> results;
  for (const Address address : outputs) results.push_back(required<float>("outputs", address, student.rows));
  for (const SequencePlace place : call.in.code->outputs)
    if (place == kTokenOutput) throw std::invalid_argument("code: expected outputs per row");
  call.outputs = results.data();
  std::vector<DivergenceMoments> known_moments;
  if (!moments.empty()) {
    expect_size("moments", moments.size(), call.in.code->outputs.size);
    for (const Moments& m : moments) known_moments.push_back({m[0], m[1], m[2], m[3], m[4]});
    call.moments = known_moments.data();
  }
  FASTREWARD_DISPATCH(divergence_forward)(call);
}

void backward(const LogprobsRows& student, const LogprobsRows& teacher, Address code, const Places& made,
              const std::vector<Address>& inputs, const std::vector<double>& scalars, const std::vector<Term>& terms,
              Address student_values, Address teacher_values, Address label_gradients, Address grad_logits, std::int64_t grad_stride) {
  const pybind11::gil_scoped_release unlocked;
  const Rows rows(student, teacher, code, made, inputs, scalars);
  DivergenceBackward call;
  call.in = rows.in;
  if (call.in.code->outputs.size != 1 || call.in.code->outputs[0] != kTokenOutput)
    throw std::invalid_argument("code: expected one output per token");
  call.student_values = required<const float>("student_values", student_values, kValues * student.rows);
  call.teacher_values = required<const float>("teacher_values", teacher_values, kValues * student.rows);
  call.label_gradients = at<const float>(label_gradients);
  call.grad_logits = required<void>("grad_logits", grad_logits, student.rows * student.columns);
  call.grad_stride = grad_stride;
  std::vector<DivergenceTerm> products;
  for (const auto& [product, factor, of] : terms) {
    if (product < 0 || product >= kDivergenceProducts) throw std::invalid_argument("terms: no such product");
    for (const int k : of)
      if (k < 0 || k >= call.in.code->inputs.size || (student.rows > 0 && call.in.inputs[k] == nullptr))
        throw std::invalid_argument("terms: expected numbers of inputs per row");
    products.push_back({static_cast<DivergenceProduct>(product), factor, {of.data(), static_cast<int>(of.size())}});
  }
  call.terms = {products.data(), static_cast<int>(products.size())};
  FASTREWARD_DISPATCH(divergence_backward)(call);
}

void head_share(const LogprobsRows& student, const LogprobsRows& teacher, Address student_values,
                Address teacher_values, double alpha, Address shares) {
  const pybind11::gil_scoped_release unlocked;
  if (teacher.rows != student.rows || teacher.columns != student.columns)
    throw std::invalid_argument("teacher: expected as many rows and columns as the student has");
  DivergenceHeadShare call;
  call.student = student;
  call.teacher = teacher;
  required<const void>("student", reinterpret_cast<Address>(student.logits), student.rows * student.columns);
  required<const void>("teacher", reinterpret_cast<Address>(teacher.logits), student.rows * student.columns);
  call.student_values = required<const float>("student_values", student_values, kValues * student.rows);
  call.teacher_values = required<const float>("teacher_values", teacher_values, kValues * student.rows);
  call.alpha = alpha;
  call.shares = required<float>("shares", shares, student.rows);
  FASTREWARD_DISPATCH(divergence_head_share)(call);
}

}  // namespace

void register_divergence(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("divergence_forward", &forward, py::kw_only(), py::arg("student"), py::arg("teacher"), py::arg("code"),
        py::arg("made"), py::arg("inputs"), py::arg("scalars"), py::arg("moments"), py::arg("student_flags"),
        py::arg("teacher_flags"), py::arg("known"), py::arg("student_values"), py::arg("teacher_values"),
        py::arg("student_indices"), py::arg("teacher_indices"), py::arg("outputs"),
        "The statistics of both sides' rows and the program's outputs.");
  m.def("divergence_backward", &backward, py::kw_only(), py::arg("student"), py::arg("teacher"), py::arg("code"),
        py::arg("made"), py::arg("inputs"), py::arg("scalars"), py::arg("terms"), py::arg("student_values"),
        py::arg("teacher_values"), py::arg("label_gradients"), py::arg("grad_logits"), py::arg("grad_stride"),
        "The gradient for the logits: what the program gives for each token, in the student's dtype.");
  m.def("divergence_head_share", &head_share, py::kw_only(), py::arg("student"), py::arg("teacher"),
        py::arg("student_values"), py::arg("teacher_values"), py::arg("alpha"), py::arg("shares"),
        "What lies in the teacher's head of the difference between both, per row.");
}

}  // namespace fastreward
